//! Drives the program as a user does.
