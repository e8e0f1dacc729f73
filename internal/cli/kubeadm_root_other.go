//go:build !unix

package cli

import "errors"

// changeRoot is known for Unix only.
func changeRoot(string) error { return errors.ErrUnsupported }
