"""Operations: a public function, its torch reference and the choice of implementation, one a file."""
