"""A page on which one draws, and sees what a capsule network makes of the drawing."""
