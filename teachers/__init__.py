"""The generate and select stages: prompts become verified reasoning traces and a documented training set."""
