"""A small recall model: its synthetic tasks, tokenizer, training and evaluation."""
