"""A cluster on one machine: hosts as network namespaces, joined by shaped links; boots recorded and replayed."""
