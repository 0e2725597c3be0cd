"""Image and text encoders: from pixels and titles to one vector an item."""
