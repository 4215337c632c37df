"""Pure tensor maths: formulas with their paper, no model, no configuration, no random draws of their own."""
