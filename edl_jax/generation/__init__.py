"""Continue prompts: sampling, stop strings, the loop over tokens."""
