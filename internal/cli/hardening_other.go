//go:build !linux

package cli

import "errors"

// forbidDumps is known for Linux only.
func forbidDumps() error { return errors.New("core dumps are turned off on Linux only") }
