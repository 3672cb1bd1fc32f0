"""The catalog of methods: pure PyTorch rules, one file per method, grouped by family."""
