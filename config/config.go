// Package config reads etcd-kms-proxy's configuration file.
//
// [Load] is strict: an unknown field, a field that is given twice, a value of the wrong type or a
// rule that refers to nothing is a problem. All problems of a file are returned at once as
// [Problems], each with its path, its line and a hint. A returned [Config] is complete: defaults
// are filled in, relative file names are resolved, and every file that it names could be read.
//
// The comments of the types are the manual: docs/reference/configuration.md is generated from them.
// The package starts nothing, connects to nothing and contains no secrets, only the names of their
// files.
package config

//go:generate go run ./internal/gendoc -types types.go,types_kms.go -example testdata/example.yaml -out ../docs/reference/configuration.md

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
)

const (
	// APIVersion and Kind begin every file.
	APIVersion = "etcd-kms-proxy.io/v1alpha1"
	// Kind is the only kind there is.
	Kind = "ProxyConfiguration"
	// Plaintext is the writeWith of a rule that does not encrypt. No provider may have this name.
	Plaintext = "plaintext"
	// Placeholder is in an endpoint of a generated configuration that the operator must replace.
	Placeholder = "REPLACE"

	maxFile = 4 << 20 // bytes of a configuration file
)

// Checks are further checks by the packages that use parts of a configuration. Each is called with
// a part that has no other problem. The paths of its problems are relative to the part, and it sets
// no lines. Fields may be nil.
type Checks struct {
	KMS   func(KMS) []Problem
	Audit func(Audit) []Problem
	// Warn is called for settings that are valid but rarely meant. It may be nil.
	Warn func(Problem)
	// KMSFilesMayMiss accepts files of providers that cannot be read, for a caller that treats the
	// keys of some providers as lost. What uses the others reports theirs.
	KMSFilesMayMiss bool
}

// Load reads, checks and completes the file at path. The error is a [Problems] if the file could be
// read and is wrong.
func Load(path string) (*Config, error) { return LoadChecked(path, Checks{}) }

// LoadChecked is Load with further checks.
func LoadChecked(path string, checks Checks) (*Config, error) {
	f, err := os.Open(path) //nolint:gosec // the operator names the file
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	if len(data) > maxFile {
		return nil, fmt.Errorf("read configuration: %s is larger than %d MiB", path, maxFile>>20)
	}
	return Parse(path, data, checks)
}

// Parse checks and completes the bytes of a file at path, which it does not read.
func Parse(path string, data []byte, checks Checks) (*Config, error) {
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	return parse(data, dir, readFile, checks)
}

// parse checks and completes the bytes of a file in folder dir. The files that it names are read
// with read.
func parse(data []byte, dir string, read func(path string) ([]byte, error), checks Checks) (*Config, error) {
	c := new(Config)
	d := &decoder{checker: newChecker(dir, read), data: data, kmsFilesMayMiss: checks.KMSFilesMayMiss}
	if d.document(c) {
		v := &validator{d.checker}
		v.validate(c)
		v.checkParts(c, checks)
	}
	if checks.Warn != nil {
		for _, p := range d.warnings {
			checks.Warn(p)
		}
	}
	if len(d.problems) > 0 {
		slices.SortStableFunc(d.problems, func(a, b Problem) int { return a.Line - b.Line })
		return nil, d.problems
	}
	return c, nil
}

// readFile reads a file that the configuration names. Only regular files are opened, since a pipe
// would block, and none is larger than a set of certificates can be.
func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "read", Path: path, Err: fmt.Errorf("not a regular file")}
	}
	if info.Size() > maxFile {
		return nil, &fs.PathError{Op: "read", Path: path, Err: fmt.Errorf("larger than %d MiB", maxFile>>20)}
	}
	return os.ReadFile(path) //nolint:gosec // the operator names the file
}

// Problem is one thing that is wrong with a file.
type Problem = problem.Problem

// Problems is everything that is wrong with a file, by line. It has at least one element.
type Problems = problem.List
