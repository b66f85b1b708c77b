"""Text from a model: prompts to tokens, jitted prefill and decode, tokens to text."""
