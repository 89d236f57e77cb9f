"""What people look at: drawings of what other modules measured."""
