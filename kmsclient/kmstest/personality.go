package kmstest

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"time"
)

// Personality is in what a public KMS v2 plugin differs from a careful one, and from the others, as
// these were seen to behave in December 2026. None of them says why a call failed: whatever it was,
// a damaged or foreign ciphertext, a disabled key or an outage, the gRPC code is Unknown.
type Personality struct {
	Name string
	// Unusable says why nothing can be encrypted with the plugin; "" if it can. A caller must find
	// out before it encrypts anything.
	Unusable string
	// Garbage plugins unwrap what is damaged to something else, or panic.
	Garbage bool
	// OneVersion plugins unwrap only what the key version wrapped that their process was started
	// with.
	OneVersion bool

	keyID func(version int) string
	// what Status says until a call has passed the version to the plugin; nil: keyID
	statusKeyID func(version int) string
	annotations map[string][]byte // given with each wrapped secret
	beta        bool              // Status names the API's version v2beta1
	// how long Status says "err" after an Encrypt or Decrypt that failed
	unhealthyFor    time.Duration
	statusCalls     int  // at the vendor, of one Status that is well
	failingCalls    int  // at the vendor, of one Status in an outage
	ignoresDeadline bool // in Status, while the vendor does not answer
	pad             int  // bytes more of a wrapped secret
	lose            int  // bytes at the end that Decrypt does not give back
}

// Opts returns what [Conformance] has to know of the plugin.
func (p Personality) Opts() []Option {
	opts := []Option{Opaque(), MaxPlaintext(512)}
	if p.Garbage {
		opts = append(opts, Garbage())
	}
	return opts
}

func named(format string) func(int) string {
	return func(version int) string { return fmt.Sprintf(format, version) }
}

// hashed is a key ID that reveals neither the key nor its version.
func hashed(version int) string {
	sum := sha256.Sum256([]byte(fmt.Sprintf("https://vault.example/keys/k/%d", version)))
	return hex.EncodeToString(sum[:])
}

// Personalities returns those of the public plugins that were tried.
func Personalities() []Personality {
	return []Personality{
		{
			Name: "aws-encryption-provider", keyID: named("arn:aws:kms:eu-central-1:111122223333:key/00000000-0000-0000-0000-%012d"),
			beta: true, unhealthyFor: 30 * time.Second, statusCalls: 2, failingCalls: 2,
		},
		{Name: "vault-kubernetes-kms", keyID: named("%d"), statusCalls: 4, failingCalls: 2},
		{
			Name: "k8s-cloudkms-plugin", keyID: named("projects/p/locations/global/keyRings/r/cryptoKeys/k/cryptoKeyVersions/%d"),
			statusKeyID: func(int) string { return "projects/p/locations/global/keyRings/r/cryptoKeys/k" }, statusCalls: 1, failingCalls: 1,
		},
		{
			Name: "azure-kubernetes-kms", keyID: hashed, OneVersion: true, statusCalls: 2, failingCalls: 1,
			annotations: map[string][]byte{"date.azure.akv.io": {}, "version.azure.akv.io": []byte("1"), "algorithm.azure.akv.io": []byte("RSA-OAEP-256")},
		},
		{Name: "barbican-kms-plugin", keyID: named("5d8a7a8e-0000-0000-0000-%012d"), Garbage: true},
		{Name: "okms", keyID: named("0d9b7a64-0000-0000-0000-%012d"), statusCalls: 1, failingCalls: 5, ignoresDeadline: true},
		{Name: "pkcs11-mock", keyID: named("kms-test-%d"), statusCalls: 1, failingCalls: 1},
		{
			Name: "k8s-hsm-kmsv2", keyID: func(version int) string { return hashed(version)[:16] }, OneVersion: true,
			statusCalls: 1, failingCalls: 1,
		},
		{Name: "kleidi", keyID: named("kleidi/%d"), statusCalls: 1, failingCalls: 1},
		{Name: "age-kms-plugin", keyID: named("age1-%d"), pad: 1310, Unusable: "with twelve recipients a wrapped seed has 1,310 bytes, and 1,024 can be stored"},
		{Name: "stackit", keyID: named("stackit/%d"), lose: 2, Unusable: "it loses the last 2 of 32 bytes"},
	}
}
