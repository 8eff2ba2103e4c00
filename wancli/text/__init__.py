"""A prompt to tokens to a cached embedding; how far two prompts are apart."""
