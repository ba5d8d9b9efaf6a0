"""Learning from other models: teachers beside the student, what they say kept on disk, and answers that they write."""
