"""Texts to judge models by; README.md says where they come from."""
