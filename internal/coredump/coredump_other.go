//go:build !linux

// Package coredump keeps keys and values that are in memory out of core dumps.
package coredump

import "errors"

// Forbid is implemented on Linux only.
func Forbid() error { return errors.New("core dumps are turned off on Linux only") }
