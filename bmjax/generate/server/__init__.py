"""An OpenAI-compatible endpoint of a model: `bmjax serve`."""
