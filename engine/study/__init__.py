"""Which steps can a lighter model take? Studies of a pair of denoisers on held-out text."""
