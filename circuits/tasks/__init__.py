"""Tasks: prompts, answers, named spans and counterfactuals; files of them, and well-known sources of them."""
