"""A stream log that servers share, in Valkey or Redis. Imported only where one is named."""
