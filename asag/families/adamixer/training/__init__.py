"""How AdaMixer trains."""
