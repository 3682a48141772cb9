"""Where cachepass meets other libraries."""
