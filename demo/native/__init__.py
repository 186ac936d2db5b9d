"""The native twin: a small mixture of experts trained from scratch, whose routers grew with their experts."""
