//go:build !unix

package cli

import "errors"

// changeRoot is supported on Unix only.
func changeRoot(string) error { return errors.ErrUnsupported }
