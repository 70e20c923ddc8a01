"""The application: command line, search engine, demonstration."""
