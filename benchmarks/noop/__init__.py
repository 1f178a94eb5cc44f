"""The application without its forward, and without the way to it: what serving alone takes."""
