package envelope

import "strings"

// IsAnnotationKey reports whether s may be the key of an annotation. That is a fully qualified
// domain name as in Kubernetes: at least two lower-case labels of RFC 1123 in at most 253 bytes,
// with or without a dot at the end. It accepts exactly what IsFullyQualifiedDomainName of
// k8s.io/apimachinery accepts, so that every value that kube-apiserver stores can be read;
// test/interop compares the two.
func IsAnnotationKey(s string) bool {
	s = strings.TrimSuffix(s, ".")
	if len(s) > 253 {
		return false
	}
	labels := 0
	for label := range strings.SplitSeq(s, ".") {
		labels++
		if len(label) == 0 || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for i := range len(label) {
			if c := label[i]; c != '-' && (c < '0' || c > '9') && (c < 'a' || c > 'z') {
				return false
			}
		}
	}
	return labels >= 2
}
