"""Vectors to scored pairs: the FAISS index, the join over a threshold, nearest neighbours."""
