"""Talking to models: one at a time, or two side by side with a vote that becomes a preference row."""
