"""Tables that name pictures and have their captions."""
