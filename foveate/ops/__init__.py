"""Pure tensor functions that the methods are made of."""
