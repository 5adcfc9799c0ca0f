"""The tables of a store of pairs and ratings."""

from __future__ import annotations

VERSION = 1
SCHEMA = """
CREATE TABLE items (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    prompt TEXT NOT NULL,  -- JSON
    first TEXT NOT NULL,   -- JSON
    second TEXT NOT NULL,  -- JSON
    queued REAL NOT NULL,  -- Unix seconds, as are all times
    asked REAL NOT NULL    -- when it was queued last
);
CREATE TABLE ratings (
    id INTEGER PRIMARY KEY,
    item INTEGER NOT NULL REFERENCES items (id),
    rater TEXT NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('first', 'second', 'tie', 'skip')),
    quality_first INTEGER CHECK (quality_first BETWEEN 1 AND 5),
    quality_second INTEGER CHECK (quality_second BETWEEN 1 AND 5),
    first_left INTEGER NOT NULL,
    seconds REAL NOT NULL,
    rated REAL NOT NULL,
    UNIQUE (item, rater)
);
CREATE TABLE leases (
    item INTEGER NOT NULL REFERENCES items (id),
    rater TEXT NOT NULL,
    expires REAL NOT NULL,
    PRIMARY KEY (item, rater)
);
CREATE TABLE raters (name TEXT PRIMARY KEY, seen REAL NOT NULL);
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
