"""The life of an adapter: what it says of itself, where it lies, and which slot it sits in."""
