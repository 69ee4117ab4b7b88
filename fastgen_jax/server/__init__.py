"""HTTP front end: OpenAI's protocol over one engine thread. Knows text and HTTP; never arrays."""
