"""The methods: one file each, found by ``foveate.reducer.discover``."""
