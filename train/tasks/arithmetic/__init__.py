"""The demo's room: synthetic arithmetic, and the embedded model that knows some of it."""
