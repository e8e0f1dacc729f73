//go:build !unix

package main

import "errors"

// changeRoot is known for Unix only.
func changeRoot(string) error { return errors.ErrUnsupported }
