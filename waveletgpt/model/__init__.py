"""The models: configuration, blocks, mixers and what they remember while decoding; what they cost."""
