"""Which parts of a model do two tasks share, and what happens without them?"""
