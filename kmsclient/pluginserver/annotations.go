package pluginserver

import (
	"maps"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
)

// requestIDAnnotation holds the KMS' own id of the request that wrapped a DEK seed, to find it in
// the KMS' audit log. It is stored in every value under the seed. The KMS does not get it back.
const requestIDAnnotation = "request-id.etcd-kms-proxy.io"

// withRequestID returns a KMS' annotations and the request ID, without that if it does not fit into
// a stored value.
func withRequestID(given map[string][]byte, requestID string) map[string][]byte {
	if _, taken := given[requestIDAnnotation]; requestID == "" || taken {
		return given
	}
	total := len(requestIDAnnotation) + len(requestID)
	for k, v := range given {
		total += len(k) + len(v)
	}
	if total > envelope.MaxAnnotations {
		return given
	}
	all := map[string][]byte{requestIDAnnotation: []byte(requestID)}
	maps.Copy(all, given)
	return all
}

// kmsAnnotations returns those annotations of a value that are the KMS' own: a KMS may refuse
// others. The rest are the request ID and the recovery copies in a value that the proxy wrote.
func kmsAnnotations(all map[string][]byte) map[string][]byte {
	own := maps.Clone(all)
	maps.DeleteFunc(own, func(k string, _ []byte) bool { return envelope.IsReserved(k) || k == requestIDAnnotation })
	return own
}
