"""Formats: a reader for what comes in and, where one makes sense, a writer for what goes out."""
