// Package envelope is the stored value, byte for byte: the format that kube-apiserver writes with a
// KMS v2 provider.
//
//	"k8s:enc:kms:v2:" <provider> ":" EncryptedObject
//
//	EncryptedObject (protobuf)
//	  1 encryptedData           bytes              not empty
//	  2 keyID                   string             1..1024 bytes: the key ID as the KMS answered it
//	  3 encryptedDEKSource      bytes              1..1024 bytes: the wrapped seed as the KMS answered it
//	  4 annotations             map<string,bytes>  keys are FQDNs; keys and values together at most 32,768 bytes
//	  5 encryptedDEKSourceType  enum               0 AES_GCM_KEY (read only), 1 HKDF_SHA256_XNONCE_AES_GCM_SEED (written)
//
//	encryptedData, type 1:  info[32 random] | nonce[12 random] | AES-256-GCM ciphertext | tag[16]
//	                        key = HKDF-Expand-SHA256(PRK = seed, info), 32 bytes
//	encryptedData, type 0:  nonce[12] | AES-GCM ciphertext | tag[16], under the unwrapped bytes themselves
//
// The additional data of both is the whole etcd key, so a value decrypts only under the key that it
// was written to.
//
// The package is pure: no I/O, no clock, no KMS. Randomness comes from crypto/rand. It converts a
// seed and a plaintext to stored bytes and back; crypto/keyring, its main caller in the data path,
// selects the seed and decides whether it may be used.
package envelope
