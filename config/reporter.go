package config

import (
	"fmt"
	"strings"
)

// reporter collects the problems of a file.
type reporter struct {
	lines    map[string]int  // line of each path that is present; "" is the file
	reported map[string]bool // paths that a problem was reported for
	problems Problems
	warnings Problems
}

// report adds a problem, unless its path has one already: what follows from a first mistake helps
// nobody.
func (r *reporter) report(path, hint, format string, args ...any) {
	if r.reported[path] && path != "" {
		return
	}
	r.reported[path] = true
	r.problems = append(r.problems, Problem{Path: path, Line: r.line(path), Text: fmt.Sprintf(format, args...), Hint: hint})
}

// warn adds a warning.
func (r *reporter) warn(path, hint, format string, args ...any) {
	r.warnings = append(r.warnings, Problem{Path: path, Line: r.line(path), Text: fmt.Sprintf(format, args...), Hint: hint})
}

// line returns the line of path, or of the nearest part of the file that would hold it.
func (r *reporter) line(path string) int {
	for path != "" {
		if n, ok := r.lines[path]; ok {
			return n
		}
		path = path[:max(0, strings.LastIndexAny(path, ".["))]
	}
	return r.lines[""]
}

// present reports whether the file gives path.
func (r *reporter) present(path string) bool { _, ok := r.lines[path]; return ok }

// reportAt reports a problem on a line of its own, whatever else is wrong with path.
func (r *reporter) reportAt(line int, path, hint, format string, args ...any) {
	r.reported[path] = true
	r.problems = append(r.problems, Problem{Path: path, Line: line, Text: fmt.Sprintf(format, args...), Hint: hint})
}

// hasProblem reports whether a problem was reported for path or something in it.
func (r *reporter) hasProblem(path string) bool {
	for bad := range r.reported {
		if rest, ok := strings.CutPrefix(bad, path); ok && (rest == "" || rest[0] == '.' || rest[0] == '[') {
			return true
		}
	}
	return false
}
