"""Where people meet the library: terminal, bars."""
