"""The story of query: find matches, hand instances back."""
