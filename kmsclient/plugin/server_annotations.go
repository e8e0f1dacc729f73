package plugin

import (
	"maps"
	"strings"
)

const (
	// requestIDAnnotation names the KMS' own id of the request that wrapped a seed, to find it in the KMS' audit log. It goes into every value
	// under the seed, and means nothing to the KMS.
	requestIDAnnotation = "request-id.etcd-kms-proxy.io"
	// recoverySuffix ends the annotations in which the proxy keeps recovery copies of a seed. A value that it wrote brings them along.
	recoverySuffix = ".recovery.etcd-kms-proxy.io"
	// maxAnnotations is what fits into a stored value, in bytes.
	maxAnnotations = 32 << 10
)

// annotated returns a KMS' annotations and the request ID. It keeps to what can be stored: the id is what is left out.
func annotated(given map[string][]byte, requestID string) map[string][]byte {
	if _, taken := given[requestIDAnnotation]; requestID == "" || taken {
		return given
	}
	total := len(requestIDAnnotation) + len(requestID)
	for k, v := range given {
		total += len(k) + len(v)
	}
	if total > maxAnnotations {
		return given
	}
	all := make(map[string][]byte, len(given)+1)
	maps.Copy(all, given)
	all[requestIDAnnotation] = []byte(requestID)
	return all
}

// bare returns what the KMS itself gave of the annotations of a value: a KMS may refuse those that it does not know.
func bare(all map[string][]byte) map[string][]byte {
	var own map[string][]byte
	for k, v := range all {
		if k == requestIDAnnotation || strings.HasSuffix(k, recoverySuffix) {
			continue
		}
		if own == nil {
			own = make(map[string][]byte, len(all))
		}
		own[k] = v
	}
	return own
}
