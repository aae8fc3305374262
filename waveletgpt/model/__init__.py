"""The model: its configuration, the transformer, filters over time, and what they remember while decoding."""
