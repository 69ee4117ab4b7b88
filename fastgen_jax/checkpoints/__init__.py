"""The only place that knows formats on disk: Hugging Face's, quantised ones, converted ones."""
