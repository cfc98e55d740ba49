"""Speed and memory, outside the tests."""
