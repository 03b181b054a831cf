"""A package, so that its tests share a browser and no others have it."""
