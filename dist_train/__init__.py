"""Find which postings of a catalogue are the same product: train, embed, index, match."""

__version__ = "0.1.0"
